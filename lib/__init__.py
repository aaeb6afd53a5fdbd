"""Does empathy in a language model split into perspective-taking and warmth, and how much room does it have?"""
