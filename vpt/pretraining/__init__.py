"""Pretraining of the small parts: a base that reads what it sees, encoders whose patches tell what they show."""
