"""What people see: errors without tracebacks, progress, tables. Must not decide anything about a run."""
