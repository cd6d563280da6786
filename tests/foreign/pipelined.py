# Many requests under way on several connections, which see each other's writes.
import random
random.seed(7)
assert nbd.NBD().connect_uri is not None
hs = []
for _ in range(4):
    h = nbd.NBD()
    h.connect_uri(uri)
    assert h.can_multi_conn()
    hs.append(h)
size = hs[0].get_size()

def settle(h, cookies):
    left = set(cookies)
    while left:
        h.poll(10000)
        left = {cookie for cookie in left if not h.aio_command_completed(cookie)}

block = 16384
order = list(range(size // block))
random.shuffle(order)
pending = {h: [] for h in hs}
for n, at in enumerate(order):
    h = hs[n % 4]
    data = nbd.Buffer.from_bytearray(bytearray([at % 251 + 1]) * block)
    pending[h].append(h.aio_pwrite(data, at * block))
    if len(pending[h]) >= 64:
        settle(h, pending[h])
        pending[h] = []
for h in hs:
    settle(h, pending[h])
hs[0].flush()

# Large and small in turns, so that small ones may overtake.
reads = []
for n in range(400):
    h = hs[n % 4]
    length = 1 << 20 if n % 7 == 0 else 4096
    offset = random.randrange(0, (size - length) // 4096) * 4096
    buffer = nbd.Buffer(length)
    reads.append((h, h.aio_pread(buffer, offset), buffer, offset, length))
for h in hs:
    settle(h, [cookie for other, cookie, *_ in reads if other is h])
for h, cookie, buffer, offset, length in reads:
    got = buffer.to_bytearray()
    for at in range(0, length, 4096):
        assert got[at] == (offset + at) // block % 251 + 1, (offset, at)
for h in hs:
    h.shutdown()
