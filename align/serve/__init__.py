"""The search page: a local, read-only server over the search index."""
