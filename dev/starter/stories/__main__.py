"""Show a few stories with what can be asked about them: `python -m dev.starter.stories [SEED]`."""

import sys

from dev.starter.stories import stories

if __name__ == "__main__":
    for story in stories(8, seed=int((sys.argv[1:] or ["0"])[0])):
        print(f"{story.text}\n")
        for question, answer in story.questions():
            print(f"    {question} {answer}")
        print()
