"""Keep the libraries' chatter away from the result; downloads from the hub keep their bars."""


def hush() -> None:
    """Turn off the bars of loading weights and components; they would bury our own."""
    import diffusers
    import huggingface_hub
    import transformers

    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers turns these off with its own
