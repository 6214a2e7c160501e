"""Tasks: conversations to finetune on, questions to evaluate, and rewards for RL.

Names are in `registry.py`, the mixtures of chat_sft in `mixtures.py`. Start with `common.py` (the interface), then
`arithmetic.py` (a short task). To add one, see dev/NEW_SKILL.md.
"""
