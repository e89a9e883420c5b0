"""Every sentence of the page in one table; another language is another table."""

from __future__ import annotations

from typing import Any

ENGLISH: dict[str, Any] = {
    "title": "lowmem",
    "tagline": "Language models inside a memory budget",
    "shares": {
        "weights": "Weights",
        "kv": "KV cache",
        "activations": "Activations",
        "scratch": "Scratch",
        "overhead": "Runtime",
        "free": "Free",
    },
    "memory": {"ram": "RAM", "vram": "GPU memory"},
    "verdicts": {"fits": "Fits", "tight": "Tight", "over": "Over budget"},
    "choices": {"same": "Same as the computation", "int8": "int8"},
    # the set-up card
    "recommended": "Recommended for this machine",
    "chosen": "Your choice",
    "automatic": "Automatic",
    "load": "Load {model} in {precision} and chat",
    "over": "Over budget",
    "cannot_load": "Nothing to load",
    "trouble": "That did not work",
    "anyway": "Try anyway",
    "remedies": "Any one of these would fit:",
    "stop": "Stop",
    "back": "Back to the resident model",
    "choose": "Choose something else",
    "declined": "What was looked at and not taken ({count})",
    "not_here": "Not on this machine",
    "model": "Model",
    "model_help": "Pick one, or type a hub id, a folder or a .gguf file.",
    "precision": "Precision",
    "precision_help": "Fewer bits, less memory.",
    "context": "Context",
    "context_help": "Tokens of prompt and answer together that the KV cache is planned for.",
    "device": "Runs on",
    "device_help": "Where the model computes.",
    "kv": "KV cache storage",
    "kv_help": "int8 halves or quarters the cache, a little less exactly.",
    "download": "Download {size}",
    "on_disk": "Already on this machine",
    "disk_free": "{size} free on disk",
    "starting": "Starting the engine",
    "waiting": "Waiting: {busy}",
    "stopping": "Stopping",
    "stopped": "Stopped.",
    # sidebar
    "budget": "Memory budget",
    "next_answer": "For an answer within {tokens} tokens",
    "ram_slider": "RAM to use, GB",
    "vram_slider": "GPU memory to use, GB",
    "pretend": "Pretend this machine has",
    "pretend_all": "All",
    "live": "In use now",
    "resident": "Resident model",
    "nothing_resident": "None. The memory is free.",
    "unload": "Unload",
    "unloading": "Unloading",
    "change": "Change model",
    "receipt": "Last receipt",
    "no_receipt": "Predicted against measured memory appears here after the first action.",
    "snippet": "Repeat it in Python",
    "disk": "Disk",
    # generate
    "generate": "Generate",
    "chat": "Chat",
    "completion": "Completion",
    "batch": "Batch",
    "message": "Message",
    "message_hint": "Write a message",
    "send": "Send",
    "chat_empty": "Ask something.",
    "no_template": "{model} has no chat template: its messages are joined as plain text. Completion suits it better.",
    "system": "System prompt",
    "system_hint": "Optional: how the model should behave",
    "options": "Options",
    "more_options": "More options",
    "one_per_line": "One per line",
    "prompt": "Text to continue",
    "prompt_hint": "Once upon a time",
    "continuation": "Continuation",
    "continue": "Continue the text",
    "answer": "Answer {number}",
    "prompts": "Prompts, one per line",
    "prompts_hint": "What is a KV cache?\nName three rivers.",
    "file": "Or a file: .txt, .csv or .jsonl, up to 2 MB",
    "batch_size": "Batch size",
    "batch_size_help": "Prompts at once. 0 takes what the budget allows.",
    "template": "Use the chat template",
    "template_help": "Off continues each prompt as plain text.",
    "run_batch": "Answer all prompts",
    "csv": "Download CSV",
    "jsonl": "Download JSONL",
    "rows_more": "{count} more in the files below.",
    "answered": "{done} of {total} answered",
    "silent": "The model ended its answer at once.",
    "reading": "Reading the prompt",
    # failures
    "bug": "Something went wrong inside lowmem.",
    "bug_hint": "The log has the details under {id}.",
    "empty": "There is nothing to send.",
    "empty_hint": "Write something first.",
    "nothing_loaded": "No model is loaded.",
    "nothing_loaded_hint": "Load one first.",
    "too_long": "The text has {count:,} characters, more than the {limit:,} that are accepted.",
    "too_long_hint": "Shorten it.",
}


def say(key: str, **values: object) -> str:
    """The sentence behind `key`, filled in."""
    text: str = ENGLISH[key]
    return text.format(**values) if values else text


def name(group: str, key: str) -> str:
    """A name out of a group ("shares", "memory", "verdicts"); an unknown key names itself."""
    names: dict[str, str] = ENGLISH[group]
    return names.get(key, key)
