-- ARGV: fingerprint, nonce, lease, retention, what to do with a lost key, most attempts, whether replicas must have the answer
local fingerprint, nonce, if_lost = ARGV[1], ARGV[2], ARGV[5]
local lease, retention, max_attempts = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])

local function granted(record)
  return {record.kind == RECOVER and 'recover' or 'execute', record.fence, record.attempt}
end

-- A full server refuses new claims. It need not refuse what can be answered without the write.
local function put_if_room(record)
  local refusal = put(record)
  if refusal and not string.find(refusal.err, 'OOM', 1, true) then return refusal end
end

local record, refusal = read()
if refusal then return refusal end

if not record then
  record = {kind = EXECUTE, fingerprint = fingerprint, nonce = nonce, fence = math.max(now, 1), attempt = 1, retention = retention}
  lease_for(record, lease)
  return put(record) or granted(record)
end
if record.fingerprint ~= fingerprint then return {'mismatch'} end
if record.state == UNKNOWN then return {'unknown'} end
if record.state ~= IN_FLIGHT then
  -- WAIT asks only about what its own connection wrote.
  if ARGV[7] == 'replicated' then redis.call('PEXPIREAT', key, expiry(record)) end
  return {'done', record.bytes}
end

local remaining = left(record)
-- The reply to this very claim was lost: the same grant again, of the same kind.
if record.nonce == nonce then
  record.retention = retention
  lease_for(record, lease)
  local write = remaining * 2 > lease and put_if_room or put
  return write(record) or granted(record)
end
if remaining > 0 then
  -- The clock went backwards: nobody waits longer than a lease for it to catch up.
  if record.ends > now + remaining then
    record.ends = now + remaining
    refusal = put_if_room(record)
  end
  return refusal or {'wait', remaining}
end
if if_lost == 'refuse' or record.attempt >= max_attempts then
  record.state, record.ends = UNKNOWN, 0
  refusal = put_if_room(record)
  wake()
  return refusal or {'unknown'}
end
record.kind = if_lost == 'recover' and RECOVER or EXECUTE
record.nonce, record.fence, record.attempt = nonce, math.max(now, record.fence + 1), record.attempt + 1
record.retention = retention
lease_for(record, lease)
refusal = put(record)
if refusal then return refusal end
wake()
return granted(record)
