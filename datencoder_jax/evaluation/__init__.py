"""How well a concept was captured: a judge trained on true pictures, scores, and the tables made of them."""
