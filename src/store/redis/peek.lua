-- Only the time and the bytes: the client decodes and decides.
local bytes = redis.pcall('GET', key)
if type(bytes) == 'table' then
  return string.find(bytes.err, 'WRONGTYPE', 1, true) and {'corrupt'} or bytes
end
if not bytes then return {'absent'} end
return {'record', now, bytes}
