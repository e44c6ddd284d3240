"""Generated protobuf and gRPC stubs. Made by `make proto`; never edited."""
