"""What the chunked forms of recurrences share: rows cut into chunks, documents, decays."""
