"""What the Makefile and the workflows run, and no user imports."""
