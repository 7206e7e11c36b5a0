"""Point-to-point communication under one name: messages, and reshard plans run with them."""

from ntp.exchange import Message, exchange
from ntp.reshard import ranges_kept, reshard

__all__ = ["Message", "exchange", "ranges_kept", "reshard"]
