"""Documents as the model reads them: chunks, reading, sensitivity, repair, costs."""
