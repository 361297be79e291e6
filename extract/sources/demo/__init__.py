"""The embedded demo data: scenes composed from drawings."""
