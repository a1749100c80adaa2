"""The fixed words around the prompt, as the model was trained with them. Data only.

The user's text stands between PREFIX + USER_LEAD and CLOSING. The pieces that are MARKS stand for one token
each and are looked up by name; every other piece is plain text and is tokenized on its own, as a tokenizer
does with the text between two marks. USER_LEAD has no mark after it, so it is tokenized together with the
user's text.
"""

BEGIN = "<|begin_of_text|>"
HEADER_START = "<|start_header_id|>"
HEADER_END = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
IMAGE = "<image>"
MARKS = (BEGIN, HEADER_START, HEADER_END, END_OF_TURN, IMAGE)

_BLANK_LINE = "\n\n"
_INSTRUCTION = (
    "\nDescribe the video by detailing the following aspects according to the reference image: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:"
)

SYSTEM_TURN = (BEGIN, HEADER_START, "system", HEADER_END, _BLANK_LINE, IMAGE, _INSTRUCTION, END_OF_TURN)
PREFIX = (*SYSTEM_TURN, _BLANK_LINE, HEADER_START, "user", HEADER_END)
USER_LEAD = _BLANK_LINE
CLOSING = (END_OF_TURN, HEADER_START, "assistant", HEADER_END, _BLANK_LINE)

TEXT_LENGTH = 256
"""Tokens for the user's text and the closing pieces together."""

DEFAULT_NEGATIVE_PROMPT = "deformation, a poor composition and deformed video, bad teeth, bad eyes, bad limbs"
