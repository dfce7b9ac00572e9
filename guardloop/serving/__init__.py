"""The moderation service: the champion answers requests, and what it answered is the next round's traffic."""
