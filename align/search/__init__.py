"""Search: embeddings of stores by a run, compared with texts, pictures and rows."""
