"""Recognition of users' own data: from a path to a manifest that one of the sources reads."""
