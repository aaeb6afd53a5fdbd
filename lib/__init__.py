"""Does empathy in a language model split into perspective-taking and warmth, and how much room does it have?"""

import sys

# jsonschema, which every notebook's kernel meets through nbformat, would build this package's grammar for more than a
# second to check addresses in schemas that hold none; without it jsonschema leaves that check out.
sys.modules.setdefault("rfc3987_syntax", None)
