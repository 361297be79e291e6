"""Reports of runs as HTML, Markdown, LaTeX and CSV."""
