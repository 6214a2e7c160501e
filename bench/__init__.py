"""Benchmarks: `python -m bench.NAME`, each about a minute with its defaults, less with smaller flags.

    train        one optimizer step: time and memory by part, and the share of matrix products
    attention    training attention, full and short window, at one, two and four times the context
    loss_head    the output head with its loss, against the plain form that materialises all logits
    optimizer    one update: Muon, the other rules, and the matrix products inside Muon
    distributed  the sharded optimizer: time, memory and speed over numbers of ranks
    data         the loader: tokens per second from text, and whether an epoch shows every token
    tokenizer    training, encoding, decoding
    recipe       effect of a change to the training recipe at equal time, over seeds (as long as you let it train)
    decode       generation: tokens per second on this device
    rollout      RL rollouts: sampling many answers at once, against one by one
    serve        the server under load over HTTP: tokens per second, time to first token, time between tokens; --hostile
    core         the CORE evaluation, batched against one item at a time
    sandbox      programs per second in the sandbox, warm and cold

All take the same flags (`--depth --head-dim --seq-len --batch --vocab-size --window-pattern --recipe --dtype
--device-type --seconds`, see `--help`), print a table and, as the last line, one JSON object.

Other load on the machine slows measurements down for seconds at a time. So variants are run alternately (a b a b ...)
and the median of each is reported. `--against=REV` does the same with two versions of the code: the working tree and
git revision REV, each in its own process, for --rounds rounds.

    python -m bench.train --depth=2 --against=HEAD       # did my change make it faster?
"""
