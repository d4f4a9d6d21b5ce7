"""Attention of many new tokens over packed keys and values: `launch.attend`; see `kernel` for how."""
