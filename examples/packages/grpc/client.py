"""Calls the server as a client in another language does, and checks the promises of the layer.

Usage: client.py ADDRESS

The client checks each claim by itself, so that a server without the layer fails all of them.
"""

import faulthandler
import pathlib
import sys
import threading
import time

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

# grpc searches the path for the proto file and generates the modules at run time. So no generated
# module can be out of date.
sys.path.append(str(pathlib.Path(__file__).parent / "proto"))
messages, services = grpc.protos_and_services("payments.proto")

# End the program after two minutes, so that it cannot wait forever.
faulthandler.dump_traceback_later(120, exit=True)
DEADLINE = 30


def keyed(key):
    return (("idempotency-key", key),)


def is_replay(call):
    return ("idempotent-replayed", "true") in [(item.key, item.value) for item in call.initial_metadata()]


def check(condition, problem):
    if not condition:
        raise AssertionError(problem)


def equal(left, right):
    check(left == right, f"{left!r} is not {right!r}")


def charge(stub, account, key, cents=100, note="", timeout=DEADLINE, **options):
    request = messages.ChargeRequest(account=account, cents=cents, note=note)
    return stub.Charge.with_call(request, metadata=keyed(key), timeout=timeout, **options)


def error_of(function):
    try:
        function()
    except grpc.RpcError as error:
        return error
    raise AssertionError("the call succeeds")


def details_of(error):
    """Returns the error details (AIP-193) by their names."""
    details = {}
    for packed in rpc_status.from_call(error).details:
        name = packed.type_url.rpartition(".")[2]
        details[name] = getattr(error_details_pb2, name)()
        packed.Unpack(details[name])
    return details


def charges(stub, account):
    return stub.CountCharges(messages.CountChargesRequest(account=account), timeout=DEADLINE).count


def duplicates(stub):
    first, call = charge(stub, "alice", "d-1")
    check(not is_replay(call), "the first response is a replay")
    for _ in range(3):
        again, call = charge(stub, "alice", "d-1")
        check(is_replay(call), "the duplicate is not a replay")
        equal(again, first)
    equal(charges(stub, "alice"), 1)


def another_request(stub):
    charge(stub, "bob", "o-1")
    error = error_of(lambda: charge(stub, "bob", "o-1", cents=200))
    equal(error.code(), grpc.StatusCode.INVALID_ARGUMENT)
    check("choose a new key" in error.details(), error.details())
    equal(details_of(error)["ErrorInfo"].reason, "KEY_REUSED")
    request = messages.ChargeRequest(account="bob")
    error = error_of(lambda: stub.Charge(request, timeout=DEADLINE))
    equal(details_of(error)["ErrorInfo"].reason, "KEY_MISSING")


def failure_in_header(stub):
    for _ in range(2):
        error = error_of(lambda: charge(stub, "blocked", "h-1"))
        equal((error.code(), error.details()), (grpc.StatusCode.FAILED_PRECONDITION, "blocked, run 1"))
    for account in ["unreachable", "closed"]:
        error_of(lambda: charge(stub, account, f"h-{account}"))
        again, call = charge(stub, account, f"h-{account}")
        check(not is_replay(call), "a failure without an effect is replayed")
        check(again.id.startswith("receipt 2"), again.id)


def watch(stub, account, key):
    return stub.Watch(messages.WatchRequest(account=account), metadata=keyed(key), timeout=DEADLINE)


def failure_in_trailers(stub):
    for _ in range(2):
        call = watch(stub, "refused", "t-1")
        equal([next(call).number, next(call).number], [10, 11])
        error = error_of(lambda: next(call))
        equal((error.code(), error.details()), (grpc.StatusCode.OUT_OF_RANGE, "no more"))
    call = watch(stub, "interrupted", "t-2")
    equal([next(call).number, next(call).number], [10, 11])
    equal(error_of(lambda: next(call)).code(), grpc.StatusCode.UNAVAILABLE)
    equal([event.number for event in watch(stub, "interrupted", "t-2")], [20, 21])


def deadline(stub):
    error = error_of(lambda: charge(stub, "slow", "l-1", timeout=0.3))
    # The server may cancel the call before the client notices that the deadline has passed.
    check(error.code() in [grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED], error)
    again, call = charge(stub, "slow", "l-1", timeout=20)
    check(again.id.startswith("receipt 1 "), again.id)
    again, call = charge(stub, "slow", "l-1")
    check(is_replay(call), "the retry is not a replay")
    equal(charges(stub, "slow"), 1)


def compression(stub):
    note = "for the flowers " * 500
    first, call = charge(stub, "carol", "c-1", note=note, compression=grpc.Compression.Gzip)
    for compressed in [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate]:
        again, call = charge(stub, "carol", "c-1", note=note, compression=compressed)
        check(is_replay(call), f"{compressed}: the duplicate is not a replay")
        equal(again, first)
    # This client cannot read compressed responses.
    options = [("grpc.compression_enabled_algorithms_bitset", 1)]
    with grpc.insecure_channel(sys.argv[1], options=options) as channel:
        again, call = charge(services.PaymentsStub(channel), "carol", "c-1", note=note)
        check(is_replay(call), "a client without compression gets no replay")
        equal(again, first)


def streams(stub):
    started = time.monotonic()
    call = watch(stub, "endless", "s-1")
    equal([next(call).number for _ in range(3)], [11, 12, 13])
    check(time.monotonic() - started < 10, "the stream is held back")
    call.cancel()
    error = error_of(lambda: next(watch(stub, "endless", "s-1")))
    equal(error.code(), grpc.StatusCode.FAILED_PRECONDITION)
    equal(details_of(error)["ErrorInfo"].reason, "RESPONSE_NOT_STORED")
    for _ in range(2):
        equal([event.number for event in watch(stub, "short", "s-2")], [10, 11])


def at_the_same_time(stub):
    receipts = []
    threads = [
        threading.Thread(target=lambda: receipts.append(charge(stub, "busy", "p-1")[0].id)) for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    equal((len(receipts), len(set(receipts))), (20, 1))
    equal(charges(stub, "busy"), 1)


def main():
    claims = {
        "duplicates get the first receipt": duplicates,
        "another request under the key is refused": another_request,
        "a failure in the header": failure_in_header,
        "a failure in the trailers": failure_in_trailers,
        "a deadline that expires": deadline,
        "compression": compression,
        "streams": streams,
        "duplicates at the same time": at_the_same_time,
    }
    failed = False
    # Switch off the retries of the library, because they would hide responses of the server.
    with grpc.insecure_channel(sys.argv[1], options=[("grpc.enable_retries", 0)]) as channel:
        stub = services.PaymentsStub(channel)
        for claim, function in claims.items():
            try:
                function(stub)
                print(f"ok: {claim}")
            except (AssertionError, grpc.RpcError) as error:
                failed = True
                print(f"FAILED: {claim}: {error}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
