"""From text to statistics: token batches (`data`), streaming Gram matrices (`statistics`), the block loop (`blocks`)."""
