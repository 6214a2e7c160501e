"""Parts of dev/build_starter_data.py: archives, cleaning, one module per kind of text, and the writers."""
