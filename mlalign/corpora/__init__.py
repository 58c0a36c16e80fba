"""Readers of public datasets for `mlalign prepare`, one module each: `read(source, ..., notes)` yields `item.Item`s.

They read what is published, in the layouts in which it is published, as streams; they drop nothing that `notes` or an
error does not name. What becomes of the items is `mlalign.sieve`'s affair.
"""
