"""Images: read, cropped, augmented and put into batches."""
