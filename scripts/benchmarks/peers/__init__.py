"""Other systems that do the bus's work, to be measured beside it."""

from peers import nats_jetstream, plain, rabbitmq, redis_streams

__all__ = ["PEERS"]

PEERS = (*redis_streams.PEERS, *nats_jetstream.PEERS, *rabbitmq.PEERS, *plain.PEERS)
