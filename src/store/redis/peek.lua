-- ARGV: whether replicas must have the answer. Only the time and the bytes: the client decodes and decides.
local bytes = redis.pcall('GET', key)
if type(bytes) == 'table' then
  return string.find(bytes.err, 'WRONGTYPE', 1, true) and {'corrupt'} or bytes
end
if not bytes then return {'absent'} end
if ARGV[1] == 'replicated' then
  -- WAIT asks only about what its own connection wrote.
  local record = decode(bytes)
  if record and record.state ~= IN_FLIGHT then redis.call('PEXPIREAT', key, expiry(record)) end
end
return {'record', now, bytes}
