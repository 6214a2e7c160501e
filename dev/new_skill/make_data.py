"""Print SFT data of the example task as .jsonl, for `chat_sft --data`; the argument is the number of conversations."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from backwards import Backwards

for conversation in Backwards(size=int(sys.argv[1]) if len(sys.argv) > 1 else 300):
    print(json.dumps(conversation["messages"]))
