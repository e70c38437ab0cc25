-- What every script begins with: the time, and the record as src/protocol/codec.rs lays it out (version 1). The transitions
-- are those of src/protocol/record.rs, and tests/redis_store.rs compares the two. Numbers are doubles: the client caps durations
-- so that all of them stay below 2^53. The operation stands in a function behind this; see scripts.rs.
local IN_FLIGHT, UNKNOWN, TOMBSTONE, KEPT = 0, 1, 2, 3
local EXECUTE, RECOVER = 0, 1
local LAYOUT, HEADER, EXACT = '<BBBc33c16I8I4I8I8I8I8', 96, 9007199254740992

local key = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

-- Whether the bytes are a record; the same question as Record::from_bytes asks.
local function is_sound(record, bytes)
  if record.kind > RECOVER or record.state > KEPT or record.fence >= EXACT then return false end
  if record.state ~= IN_FLIGHT and record.ends ~= 0 then return false end
  if record.state ~= KEPT then return #bytes == HEADER end
  if #bytes < HEADER + 4 then return false end
  local head = struct.unpack('<I4', bytes, HEADER + 1)
  return head <= #bytes - HEADER - 4
end

local function decode(bytes)
  if #bytes < HEADER or bytes:byte(1) ~= 1 then return nil end
  local record, version = {bytes = bytes}, nil
  version, record.state, record.kind, record.fingerprint, record.nonce, record.fence, record.attempt, record.lease,
    record.retention, record.ends, record.expires = struct.unpack(LAYOUT, bytes)
  return is_sound(record, bytes) and record or nil
end

-- What is left of the lease. Never more than one lease, should the clock have gone backwards.
local function left(record)
  if record.state ~= IN_FLIGHT then return 0 end
  return math.max(0, math.min(record.ends, now + record.lease) - now)
end

-- The record, or nil where there is none or it has expired; behind it the reply to give up with, if it cannot be read. What
-- cannot be read is somebody's live record: nothing is written over it.
local function read()
  local bytes = redis.pcall('GET', key)
  if type(bytes) == 'table' then
    return nil, string.find(bytes.err, 'WRONGTYPE', 1, true) and {'corrupt'} or bytes
  end
  if not bytes then return nil end
  local record = decode(bytes)
  if not record then return nil, {'corrupt'} end
  if now >= record.expires and left(record) == 0 then return nil end
  return record
end

-- The key outlives the record by a second: the record's own fields decide (a live lease outlasts any retention), the key's
-- expiry frees memory.
local function expiry(record)
  return string.format('%.0f', math.ceil(math.max(record.expires, record.ends) / 1000) + 1000)
end

-- Writes the record with its answer; returns the server's error, if it refuses.
local function put(record, answer)
  local header = struct.pack(LAYOUT, 1, record.state, record.kind, record.fingerprint, record.nonce, record.fence,
    record.attempt, record.lease, record.retention, record.ends, record.expires)
  local reply = redis.pcall('SET', key, header .. (answer or ''), 'PXAT', expiry(record))
  if reply.err then return reply end
end

-- The record outlives its lease by its retention, in every state: a crash must not make the key absent.
local function lease_for(record, lease)
  record.state, record.lease, record.ends = IN_FLIGHT, lease, now + lease
  record.expires = record.ends + record.retention
end

local function end_with(record, state, retention)
  record.state, record.ends, record.expires = state, 0, now + retention
end

local function is_owned(record, owner)
  return record.nonce .. struct.pack('<I8', record.fence) == owner
end

-- Nothing depends on it (waiters poll as well), so a user who may not publish does no harm.
local function wake()
  redis.pcall('SPUBLISH', key, '')
end
