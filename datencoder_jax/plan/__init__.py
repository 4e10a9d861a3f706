"""What a program would take of a chip that nobody has rented yet, by the compiler, from shapes alone."""
