"""One YAML file a data set."""
