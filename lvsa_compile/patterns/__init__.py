"""What attention looks like in a graph: one file per form.  A match is a record, a miss is a reason."""
