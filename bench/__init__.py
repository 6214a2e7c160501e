"""Measurements: each file is one, `python -m bench.NAME`, about a minute at its defaults, less with smaller flags.

    train       one whole optimizer step: where its time and its memory go, and what share is matrix products
    attention   the training attention, full and short window, at one, two and four times the context
    loss_head   the head with its loss, beside the plain form with all logits in memory
    optimizer   one update: Muon, AdamW, and the products inside Muon
    data        the loader: tokens a second from text, and whether an epoch shows every token
    tokenizer   training, encoding, decoding
    recipe      what a change to the training recipe is worth at equal time, over seeds (as long as you let it train)
    serve       the server under load over HTTP: tokens a second, times to the first token and between tokens; --hostile
    core        the CORE evaluation, batched beside one item at a time

All take the same flags (`--depth --head-dim --seq-len --batch --vocab-size --window-pattern --recipe --dtype
--device-type --seconds`, see `--help`), print a table and, as the last line, one JSON object.

Other programs slow a measurement down for seconds at a time. So what is compared is run in turn (a b a b ...),
never one after the other, and a median of each is reported. `--against=REV` does the same with two versions of the
code: the working tree and git revision REV, each run in a process of its own, in turn, --rounds times.

    python -m bench.train --depth=2 --against=HEAD       # did my change make it faster?
"""
