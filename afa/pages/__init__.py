"""What every report is made of: number formats, one table, charts, and HTML pages from templates."""
