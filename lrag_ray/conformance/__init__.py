"""Golden-vector readers behind `lrag-ray verify`."""
