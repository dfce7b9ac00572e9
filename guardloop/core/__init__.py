"""What every room may use: errors, settings, storage, tables, progress."""
