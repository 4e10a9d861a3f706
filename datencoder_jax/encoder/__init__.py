"""The tuning-encoder: features of a picture in, a word embedding and weight offsets out."""
