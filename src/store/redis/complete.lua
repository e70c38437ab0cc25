-- ARGV: owner, state, retention, then length of the head, head and body of a kept answer
local record, refusal = read()
if refusal then return refusal end
if not record then return {'superseded'} end
local is_done, is_owner = record.state >= TOMBSTONE, is_owned(record, ARGV[1])
if is_done and is_owner then
  -- Changes nothing, and yet is a write. By its documentation, WAIT asks only for writes of its own connection, and the first
  -- completion may have come on another. (Redis 7.0 asks for everybody's; nothing promises that it always will.)
  redis.call('PEXPIREAT', key, expiry(record))
  return {'completed'}
end
if is_done then return {'superseded', record.bytes} end
if not is_owner then return {'superseded'} end
end_with(record, tonumber(ARGV[2]), tonumber(ARGV[3]))
refusal = put(record, ARGV[4] .. ARGV[5] .. ARGV[6])
if refusal then return refusal end
wake()
return {'completed'}
