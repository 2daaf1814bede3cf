"""`python -m hapo_lite.verify_resume`: proof that a killed run resumes to the same bytes."""
