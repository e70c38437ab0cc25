-- ARGV: owner, state, retention, then length of the head, head and body of a kept answer
local record, refusal = read()
if refusal then return refusal end
if not record then return {'superseded'} end
local is_done, is_owner = record.state >= TOMBSTONE, is_owned(record, ARGV[1])
if is_done and is_owner then
  -- Changes nothing, and yet is a write: a WAIT behind it then waits for the replicas, on whatever connection it came.
  redis.call('PEXPIREAT', key, expiry(record))
  return {'completed'}
end
if is_done then return {'superseded', redis.call('GET', key)} end
if not is_owner then return {'superseded'} end
end_with(record, tonumber(ARGV[2]), tonumber(ARGV[3]))
refusal = put(record, ARGV[4] .. ARGV[5] .. ARGV[6])
if refusal then return refusal end
wake()
return {'completed'}
