-- Only the time and the bytes: the client decodes and decides.
local bytes = redis.pcall('GET', KEYS[1])
if type(bytes) == 'table' then
  return string.find(bytes.err, 'WRONGTYPE', 1, true) and {'corrupt'} or bytes
end
local time = redis.call('TIME')
if not bytes then return {'absent'} end
return {'record', time[1] * 1000000 + time[2], bytes}
