"""`python -m hapo_lite.verify_resume`: proves that a killed run resumes to the same bytes."""
