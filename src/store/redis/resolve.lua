-- ARGV: fence, state (empty: it had no effect), retention, then length of the head, head and body of a kept answer
local record, refusal = read()
if refusal then return refusal end
if not record then return {'conflict'} end
local owner_may_live = record.state >= TOMBSTONE or left(record) > 0
if owner_may_live or struct.pack('<I8', record.fence) ~= ARGV[1] then return {'conflict', record.fence} end
if ARGV[2] == '' then
  redis.call('DEL', key)
else
  end_with(record, tonumber(ARGV[2]), tonumber(ARGV[3]))
  refusal = put(record, ARGV[4] .. ARGV[5] .. ARGV[6])
  if refusal then return refusal end
end
wake()
return {'resolved'}
