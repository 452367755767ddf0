"""What arrives when: scenarios, lengths, arrival processes and recorded traces."""
