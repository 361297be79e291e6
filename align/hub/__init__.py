"""Export to other tools and import from them."""
