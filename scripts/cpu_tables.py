# SPDX-License-Identifier: Apache-2.0
"""Tables of the documents that tell time and memory on a CPU; `update_docs.py` puts them in place."""

from __future__ import annotations

from result_files import load

from headkv_mm.evaluation.tables import percent, table


def decode() -> str:
    """The ragged decode step against dense attention on the CPU."""
    rows = [
        [
            run["distribution"],
            str(content["settings"]["threads"]),
            f"{run['byte_ratio']:.2f}",
            f"{run['speedup_cpu']:.2f}x",
            percent(run["share_of_byte_ratio_cpu"], 0),
        ]
        for content in map(load, ("cpu/ragged_decode.json", "cpu/ragged_decode_two_threads.json"))
        for run in content["results"]
    ]
    return table(["lengths", "threads", "bytes, dense / ours", "speed-up (CPU time)", "share of the byte ratio"], rows)


def decode_long() -> str:
    """A small share of a long context against dense attention over all of it."""
    rows = []
    for content in map(load, ("cpu/ragged_decode_long_float32.json", "cpu/ragged_decode_long_bfloat16.json")):
        settings, run = content["settings"], content["results"][0]
        rows.append(
            [
                settings["dtype"],
                f"{percent(settings['keep'], 0)} of {settings['tokens']:,}",
                f"{run['byte_ratio']:.1f}",
                f"{run['speedup_cpu']:.1f}x",
                percent(run["share_of_byte_ratio_cpu"], 0),
            ]
        )
    return table(["dtype", "kept", "bytes, dense / ours", "speed-up (CPU time)", "share of the byte ratio"], rows)


def window_scores() -> str:
    """The price of prefill scores on the CPU."""
    content = load("cpu/window_scores.json")
    tokens = content["settings"]["tokens"]
    rows = [
        [
            "all" if run["window"] == tokens else str(run["window"]),
            f"{run['scores_cpu_ms']:.0f} ms",
            f"{run['attention_cpu_ms']:.0f} ms",
            percent(run["share_of_attention"], 2),
        ]
        for run in content["results"]
    ]
    return table(["queries", "scores", "attention of the prompt", "share"], rows)


def image_decode() -> str:
    """A whole image with and without compression."""
    rows = []
    for content in map(load, ("cpu/image_decode.json", "cpu/image_decode_batch_16.json")):
        settings, held, median = content["settings"], content["bytes"], content["median"]
        rows.append(
            [
                f"{settings['batch']} of {settings['grid']} x {settings['grid']}",
                str(settings["threads"]),
                f"`{settings['method']}` {settings['budget']}",
                percent(held["ratio"]),
                percent(held["bookkeeping_share"], 2),
                f"{median['speed_up']:.2f}x",
                percent(median["overhead_share"], 2),
            ]
        )
    heads = ["images", "threads", "method", "bytes held", "bookkeeping", "speed-up, end to end", "method's own time"]
    return table(heads, rows)


def text_cache() -> str:
    """What selection costs at the end of a prompt, and a long answer at a fixed number of entries."""
    prompt, answer = load("cpu/text_prefill.json"), load("cpu/text_decode.json")
    read, written = prompt["result"], answer["result"]
    rows = [
        [
            f"a prompt of {prompt['settings']['tokens']:,} tokens",
            f"`{prompt['settings']['method']}` {prompt['settings']['budget']}",
            percent(read["ratio"]),
            f"{percent(read['overhead'])} more CPU time than the stock cache",
        ],
        [
            f"an answer of {answer['settings']['tokens']:,} tokens",
            f"`{answer['settings']['method']}` {answer['settings']['budget']}",
            percent(written["ratio"]),
            f"{written['speed_up']:.2f}x faster over all, {written['speed_up_last_quarter']:.2f}x in the last quarter",
        ],
    ]
    return table(["what", "method", "bytes held", "CPU time"], rows)


def fastkv_prefill() -> str:
    """Reading a long prompt where only chosen tokens go on after half of the layers."""
    content = load("cpu/fastkv_prefill.json")
    settings, result = content["settings"], content["result"]
    row = [
        f"{settings['tokens']:,}",
        f"{settings['layers']}, of which {settings['tsp_layer'] + 1} see all tokens",
        percent(settings["ratio"], 0),
        percent(result["limit"], 0),
        percent(result["ratio"]),
        percent(result["nbytes"] / result["nbytes_full"]),
    ]
    heads = ["tokens", "layers", "tokens that go on", "layer-tokens", "CPU time of the stock prefill", "bytes held"]
    return table(heads, [row])


def image_throughput() -> str:
    """Images of a published model's shape: the loop that comes with it, our loop, and methods."""
    rows = []
    for content in map(load, ("cpu/image_throughput_batch_1.json", "cpu/image_throughput_batch_4.json")):
        for batch in content["batches"]:
            for run in batch["results"]:
                names = {"own loop": "full cache, the model's own loop", "full": "full cache, our loop"}
                compressed = run["method"] not in names
                rows.append(
                    [
                        f"{batch['batch']}",
                        f"`{run['method']}` {run['budget']}" if compressed else names[run["method"]],
                        percent(run["cache_ratio"]),
                        f"{run['cpu_seconds']:.1f} s",
                        f"{run['cpu_speed_up_over_own_loop']:.2f}x",
                        f"{run['cpu_speed_up']:.2f}x",
                        percent(run["parts"]["attention"]),
                        # Writing into a static cache is not timed by itself.
                        "" if run["method"] == "own loop" else percent(run["parts"]["cache"]),
                    ]
                )
    heads = [
        "images",
        "cache",
        "bytes held",
        "CPU time",
        "against own loop",
        "against our loop",
        "attention",
        "the cache's work",
    ]
    return table(heads, rows)
