"""Documents in storage for video jobs, files and batches: values, indexes, and the store that changes them."""
