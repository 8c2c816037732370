"""Results of several measurements as tables, charts and one page."""
