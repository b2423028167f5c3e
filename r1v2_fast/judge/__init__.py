"""What an answer is worth: rule, format and model rewards, and hallucination monitors."""
