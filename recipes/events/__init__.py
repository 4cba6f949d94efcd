"""The video target, its clips with event recordings, and what readers cost."""
